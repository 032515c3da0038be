"""Images from folders, named sets, other libraries' data sets or the built-in sample, ready for batches, and views;
parts of images too large to hold."""

from scrimp.data.augment import crop_flip, normalise
from scrimp.data.images import FileImages, Images, TensorImages
from scrimp.data.large_cache import PixelCache
from scrimp.data.large_image import LargeImage
from scrimp.data.load import ImageData, load_images
from scrimp.data.open_image import open_image
from scrimp.data.views import (
    STRONG,
    WEAK,
    View,
    crop_resize,
    draw_crops,
    per_image,
    standardise,
    strong_for,
    two_views,
    view_of,
)

__all__ = [
    "STRONG",
    "WEAK",
    "FileImages",
    "ImageData",
    "Images",
    "LargeImage",
    "PixelCache",
    "TensorImages",
    "View",
    "crop_flip",
    "crop_resize",
    "draw_crops",
    "load_images",
    "normalise",
    "open_image",
    "per_image",
    "standardise",
    "strong_for",
    "two_views",
    "view_of",
]
