"""Published VGG16 weights: where from, which digest, which preprocessing."""
