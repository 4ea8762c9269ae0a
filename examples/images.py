"""Small images of three classes, to train on in a second."""

import numpy as np


def images(num_images=24, size=4, num_classes=3, seed=0):
    """Returns float32 images (images, size, size, 1) and int32 labels (images,)."""
    random = np.random.default_rng(seed)
    labels = random.integers(num_classes, size=num_images)
    centres = random.normal(size=(num_classes, size, size, 1))
    noisy = centres[labels] + random.normal(size=(num_images, size, size, 1))
    return noisy.astype("float32"), labels.astype("int32")
