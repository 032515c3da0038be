""".sog of PlayCanvas, version 2: scenes that its viewers and many others open, in some 14 bytes a Gaussian."""

from scrimp.splats.sog_fields import Palette, SogFields, dequantise, quantise
from scrimp.splats.sog_read import read_sog
from scrimp.splats.sog_write import pack_sog, write_sog

__all__ = ["Palette", "SogFields", "dequantise", "pack_sog", "quantise", "read_sog", "write_sog"]
