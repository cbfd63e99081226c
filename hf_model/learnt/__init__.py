"""What a model has learnt: the diagnosis, the training data, the inspection, and the page that shows them."""
