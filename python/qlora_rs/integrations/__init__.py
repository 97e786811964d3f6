"""Where transformers is asked for something; it is imported when that is used, and not before."""
