"""Make 2D vision networks skip the pixels that do not matter."""

from sparsenet import rules as _rules  # registers what operations do to guided features
from sparsenet import timing as timing
from sparsenet import train as train
from sparsenet.context import use_backend as use_backend
from sparsenet.context import use_mask as use_mask
from sparsenet.freeze import freeze as freeze
from sparsenet.masked_conv import MaskedConv2d as MaskedConv2d
from sparsenet.plan import Plan as Plan
from sparsenet.profile import Profile as Profile
from sparsenet.profile import profile as profile
from sparsenet.record import record as record
from sparsenet.selector import GivenMask as GivenMask
from sparsenet.selector import SelectiveModule as SelectiveModule
from sparsenet.surgery import densify as densify
from sparsenet.surgery import plan as plan
from sparsenet.surgery import selectify as selectify
from sparsenet.surgery import stages as stages
from sparsenet.traced import traced as traced

del _rules
__version__ = "0.1.0"
