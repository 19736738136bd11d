"""Supervision of the mask."""

from sparsenet.train.alone import StageFeatures as StageFeatures
from sparsenet.train.alone import selector_only as selector_only
from sparsenet.train.alone import stage_features as stage_features
from sparsenet.train.budget import Budget as Budget
from sparsenet.train.direct import Direct as Direct
from sparsenet.train.distil import Distilled as Distilled
from sparsenet.train.distil import importance as importance
from sparsenet.train.indirect import Indirect as Indirect
from sparsenet.train.supervise import direct as direct
from sparsenet.train.supervise import supervise as supervise
from sparsenet.train.synchronise import synchronised as synchronised
