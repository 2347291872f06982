"""A frozen base in four bits: how it is packed (`nf4`), the layer that computes with it (`linear`), how a model gets it (`load`)."""
