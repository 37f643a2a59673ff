"""Named sources of uint8 images, batches on the device, augmentation keyed by example."""
