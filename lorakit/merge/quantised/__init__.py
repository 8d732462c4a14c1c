"""Quantised weights: what stands in the file, the weight it means, and how to write one again.

Planning reads configs, headers and the few bytes in which some formats keep a shape; torch is imported where a weight
is read or written.
"""

from lorakit.merge.quantised.config import (
    LEFT_BEHIND,
    dequantised_config,
    quantisation_settings,
)
from lorakit.merge.quantised.quantiser import Quantiser
from lorakit.merge.quantised.recognise import activation_scales, quantised_weights
from lorakit.merge.quantised.weight import QuantisedWeight, Rounding, rounding

__all__ = [
    "LEFT_BEHIND",
    "QuantisedWeight",
    "Quantiser",
    "Rounding",
    "activation_scales",
    "dequantised_config",
    "quantisation_settings",
    "quantised_weights",
    "rounding",
]
