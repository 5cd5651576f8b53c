"""How a model learns: the loss, the metrics, how parameters move, and one update of it all."""
