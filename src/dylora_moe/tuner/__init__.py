"""The model: experts, router, executions. Usable alone; needs torch, transformers and peft only."""

from dylora_moe.tuner.auxiliary import AuxiliaryLosses as AuxiliaryLosses
from dylora_moe.tuner.auxiliary import BatchLoad as BatchLoad
from dylora_moe.tuner.auxiliary import LoadWindow as LoadWindow
from dylora_moe.tuner.config import ExpertConfig as ExpertConfig
from dylora_moe.tuner.config import RoutingConfig as RoutingConfig
from dylora_moe.tuner.exchange import export_expert as export_expert
from dylora_moe.tuner.exchange import import_expert as import_expert
from dylora_moe.tuner.exchange import load_model as load_model
from dylora_moe.tuner.exchange import save_model as save_model
from dylora_moe.tuner.model import DyLoraModel as DyLoraModel
from dylora_moe.tuner.model import Expert as Expert
from dylora_moe.tuner.moments import moments_kept as moments_kept
from dylora_moe.tuner.prototype import PrototypeRouter as PrototypeRouter
from dylora_moe.tuner.routing import BASE as BASE
from dylora_moe.tuner.routing import ROUTED as ROUTED
from dylora_moe.tuner.routing import Decision as Decision
