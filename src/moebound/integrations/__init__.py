"""Other people's loaders, taught to load a store. One folder for each."""
