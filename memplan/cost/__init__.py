"""LayerGraph + HardwareProfile -> CostTable."""
