"""How a model renders conversations, and which of its tokens say what of them."""
