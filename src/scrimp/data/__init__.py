"""Labelled images from folders, named sets, other libraries' data sets or the built-in sample, ready for batches."""

from scrimp.data.augment import crop_flip, normalise
from scrimp.data.images import FileImages, Images, TensorImages
from scrimp.data.load import ImageData, load_images

__all__ = ["FileImages", "ImageData", "Images", "TensorImages", "crop_flip", "load_images", "normalise"]
