"""Learning features without labels, cheaply: ``(online, target, memory) -> loss``.

Losses: `byol_loss` (baseline), `mean_shift_loss`, `constrained_mean_shift_loss` with `earlier_views`, `same_label` or a
constraint of your own; `regression_loss` onto a frozen teacher, `logit_distillation_loss` (baseline). State: `Memory`,
`EmbeddingCache`. Networks: `projector`, `predictor`, `regression_head`, `target_of`, `follow_`. What the features are
worth: `knn_accuracy`, `linear_accuracy`.
"""

from scrimp.represent.byol import byol_loss
from scrimp.represent.cache import EmbeddingCache
from scrimp.represent.constrained import (
    Constraint,
    confident_labels,
    constrained_mean_shift_loss,
    earlier_views,
    same_label,
)
from scrimp.represent.heads import predictor, projector, regression_head
from scrimp.represent.knn import knn_accuracies, knn_accuracy
from scrimp.represent.linear import LinearProbe, few_label_rows, fit_linear_probe, linear_accuracy
from scrimp.represent.mean_shift import mean_shift_loss
from scrimp.represent.memory import NO_LABEL, Memory
from scrimp.represent.momentum import follow_, target_of
from scrimp.represent.regression import logit_distillation_loss, regression_loss

__all__ = [
    "NO_LABEL",
    "Constraint",
    "EmbeddingCache",
    "LinearProbe",
    "Memory",
    "byol_loss",
    "confident_labels",
    "constrained_mean_shift_loss",
    "earlier_views",
    "few_label_rows",
    "fit_linear_probe",
    "follow_",
    "knn_accuracies",
    "knn_accuracy",
    "linear_accuracy",
    "logit_distillation_loss",
    "mean_shift_loss",
    "predictor",
    "projector",
    "regression_head",
    "regression_loss",
    "same_label",
    "target_of",
]
