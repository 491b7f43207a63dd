"""Operator families: structures of recurrences in batched form, which choose their executor or kernel."""

from seqmodels.operators.affine import Drive, Transition, affine_recurrence
from seqmodels.operators.delta import Delta, delta_recurrence, delta_rule, diagonal_plus_rank_one
from seqmodels.operators.delta_product import delta_product
from seqmodels.operators.diagonal import Diagonal, diagonal_recurrence, diagonal_scan
from seqmodels.operators.exponential import Exponential, ExponentialState, exponential_recurrence, mlstm_scan
from seqmodels.operators.log_linear import LogLinear, log_linear_attention, log_linear_recurrence
from seqmodels.operators.moments import Moments, moments_recurrence, running_moments
from seqmodels.operators.outer import Outer, gated_linear_attention, outer_recurrence
from seqmodels.operators.rotation import rotation_recurrence, running_angles
from seqmodels.operators.selective import Selective, selective_recurrence, selective_scan
from seqmodels.operators.softmax import Scored, Softmax, merge_softmax, softmax_recurrence, softmax_scan
from seqmodels.operators.trapezoid import LastToken, Trapezoid, trapezoid_recurrence, trapezoidal_scan
from seqmodels.operators.wkv import Weighted, WKVState, wkv_recurrence, wkv_scan

__all__ = [
    "Delta",
    "Diagonal",
    "Drive",
    "Exponential",
    "ExponentialState",
    "LastToken",
    "LogLinear",
    "Moments",
    "Outer",
    "Scored",
    "Selective",
    "Softmax",
    "Transition",
    "Trapezoid",
    "WKVState",
    "Weighted",
    "affine_recurrence",
    "delta_product",
    "delta_recurrence",
    "delta_rule",
    "diagonal_plus_rank_one",
    "diagonal_recurrence",
    "diagonal_scan",
    "exponential_recurrence",
    "gated_linear_attention",
    "log_linear_attention",
    "log_linear_recurrence",
    "merge_softmax",
    "mlstm_scan",
    "moments_recurrence",
    "outer_recurrence",
    "rotation_recurrence",
    "running_angles",
    "running_moments",
    "selective_recurrence",
    "selective_scan",
    "softmax_recurrence",
    "softmax_scan",
    "trapezoid_recurrence",
    "trapezoidal_scan",
    "wkv_recurrence",
    "wkv_scan",
]
