"""A trained model in use: its answers for many images, and how right they are."""
