"""How a cache comes to a target: a class, an instance, a function, a method, a dataset, a model built late."""
