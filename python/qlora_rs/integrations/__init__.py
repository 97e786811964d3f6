"""Where transformers is asked for something: imported on use, never with the package."""
