"""What a federated method decides: the interface, and what its authors build on."""

from flexlora.method.averager import Averager, Cohort, Mean, Weights, require_means
from flexlora.method.averaging import (
    WeightedCohort,
    client_weights,
    component_shares,
    factor_means,
    parameter_norm,
    update_norm,
)
from flexlora.method.features import UnsupportedFeature, require
from flexlora.method.handout import (
    changes,
    factor_shape,
    factor_spec,
    numbered_spec,
    only_updates,
    random_components,
    stacked,
    truncated,
    with_components,
)
from flexlora.method.interface import (
    Client,
    Download,
    Feature,
    FreshAdapters,
    Info,
    Json,
    Method,
    ModuleSpec,
    RoundContext,
    State,
    Turn,
    Upload,
    UploadSpec,
    at_ranks,
)
from flexlora.method.merge_log import MergeLog
from flexlora.method.mixed_modules import MixedModules, for_mixed_modules
from flexlora.method.regularizer import Regularizer
from flexlora.method.server_optimizer import (
    ServerOptimizer,
    Step,
    WithServerOptimizer,
    with_server_optimizer,
)
from flexlora.method.truncation import Truncated, Truncation, Weighted, in_parallel, total
from flexlora.method.wrapper import MethodWrapper

__all__ = [
    "Averager",
    "Client",
    "Cohort",
    "Download",
    "Feature",
    "FreshAdapters",
    "Info",
    "Json",
    "Mean",
    "MergeLog",
    "Method",
    "MethodWrapper",
    "MixedModules",
    "ModuleSpec",
    "Regularizer",
    "RoundContext",
    "ServerOptimizer",
    "State",
    "Step",
    "Truncated",
    "Truncation",
    "Turn",
    "UnsupportedFeature",
    "Upload",
    "UploadSpec",
    "Weighted",
    "WeightedCohort",
    "Weights",
    "WithServerOptimizer",
    "at_ranks",
    "changes",
    "client_weights",
    "component_shares",
    "factor_means",
    "factor_shape",
    "factor_spec",
    "for_mixed_modules",
    "in_parallel",
    "numbered_spec",
    "only_updates",
    "parameter_norm",
    "random_components",
    "require",
    "require_means",
    "stacked",
    "total",
    "truncated",
    "update_norm",
    "with_components",
    "with_server_optimizer",
]
