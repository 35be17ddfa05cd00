"""From examples to their loss: the plain way, the frozen prefix, and the choice between them."""
