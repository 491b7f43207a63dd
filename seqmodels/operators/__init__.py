"""Operator families: structures of recurrences in batched form, which choose their executor or kernel."""

from seqmodels.operators.affine import Drive, Transition, affine_recurrence
from seqmodels.operators.convolution import causal_convolution
from seqmodels.operators.delta import Delta, delta_recurrence, delta_rule, diagonal_plus_rank_one
from seqmodels.operators.diagonal import Diagonal, diagonal_recurrence, diagonal_scan
from seqmodels.operators.dplr import DPLR, dplr_recurrence, dplr_scan
from seqmodels.operators.exponential import Exponential, ExponentialState, exponential_recurrence, mlstm_scan
from seqmodels.operators.householder import delta_product
from seqmodels.operators.log_linear import LogLinear, log_linear_attention, log_linear_recurrence
from seqmodels.operators.moments import Moments, moments_recurrence, running_moments
from seqmodels.operators.online import Traces, empty_traces, online_step
from seqmodels.operators.outer import Outer, gated_linear_attention, outer_recurrence
from seqmodels.operators.rotation import rotation_recurrence, running_angles
from seqmodels.operators.selective import Selective, selective_recurrence, selective_scan
from seqmodels.operators.softmax import Scored, Softmax, merge_softmax, softmax_recurrence, softmax_scan
from seqmodels.operators.state_space import channel_recurrence, channel_state_space, state_space
from seqmodels.operators.trapezoid import LastToken, Trapezoid, trapezoid_recurrence, trapezoidal_scan
from seqmodels.operators.wkv import Weighted, WKVState, wkv_recurrence, wkv_scan

__all__ = [
    "DPLR",
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
    "Traces",
    "Transition",
    "Trapezoid",
    "WKVState",
    "Weighted",
    "affine_recurrence",
    "causal_convolution",
    "channel_recurrence",
    "channel_state_space",
    "delta_product",
    "delta_recurrence",
    "delta_rule",
    "diagonal_plus_rank_one",
    "diagonal_recurrence",
    "diagonal_scan",
    "dplr_recurrence",
    "dplr_scan",
    "empty_traces",
    "exponential_recurrence",
    "gated_linear_attention",
    "log_linear_attention",
    "log_linear_recurrence",
    "merge_softmax",
    "mlstm_scan",
    "moments_recurrence",
    "online_step",
    "outer_recurrence",
    "rotation_recurrence",
    "running_angles",
    "running_moments",
    "selective_recurrence",
    "selective_scan",
    "softmax_recurrence",
    "softmax_scan",
    "state_space",
    "trapezoid_recurrence",
    "trapezoidal_scan",
    "wkv_recurrence",
    "wkv_scan",
]
