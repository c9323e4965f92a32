"""model + batch -> LayerGraph."""
