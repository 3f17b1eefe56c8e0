"""A trained model in use: classify many images, and measure how accurate the answers are."""
