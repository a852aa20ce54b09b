"""Fast forms of what a model computes, each with its plain reference beside it."""
