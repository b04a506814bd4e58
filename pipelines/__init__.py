"""How it flows: one page per dataflow, and the shells of its operators."""
