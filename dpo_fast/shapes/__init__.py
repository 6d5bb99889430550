"""The built-in world: captioned scenes of 16 x 16 pixels, exact scorers, and a tiny pipeline trained on them."""
