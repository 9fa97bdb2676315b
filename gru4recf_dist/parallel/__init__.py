"""Process groups, collectives that can be differentiated, and the training engines."""
