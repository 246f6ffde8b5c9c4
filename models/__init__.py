"""Model zoo: one file per published system, registered with timm.

Example::

    from fused_ops.models import create_model, list_models, load_checkpoint

    model = create_model("dsnet_tiny_star", num_classes=10)
    features = create_model("dsnet_tiny_star", features_only=True)
    load_checkpoint(model, "official.pth", new_classifier=True)
"""

from fused_ops.models import requirements  # noqa: F401, I001 (first: it says what is missing)
from fused_ops.models import dsnet  # noqa: F401 (registers its models)
from fused_ops.models import dcdc  # noqa: F401 (registers its models)
from fused_ops.models import fishnet  # noqa: F401 (registers its models)
from fused_ops.models import resnet_gates  # noqa: F401 (registers its models)
from fused_ops.models import sda  # noqa: F401 (registers its models)
from fused_ops.models import hiri_vit  # noqa: F401 (registers its models)
from fused_ops.models import hiri_vit_lifted  # noqa: F401 (registers its models)
from fused_ops.models import fcvit  # noqa: F401 (registers its models)
from fused_ops.models import pvt  # noqa: F401 (registers its models)
from fused_ops.models import vip  # noqa: F401 (registers its models)
from fused_ops.models import hlg  # noqa: F401 (registers its models)
from fused_ops.models import timm_systems  # noqa: F401 (registers its models)
from fused_ops.models.checkpoint import (
    CheckpointError,
    load_checkpoint,
    official_state_dict,
    save_checkpoint,
)
from fused_ops.models.registry import (
    count_macs,
    count_params,
    create_model,
    list_models,
    model_table,
    systems,
)

__all__ = [
    "CheckpointError",
    "count_macs",
    "count_params",
    "create_model",
    "list_models",
    "load_checkpoint",
    "model_table",
    "official_state_dict",
    "save_checkpoint",
    "systems",
]
