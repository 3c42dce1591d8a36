"""How far silbo goes: measured points beyond one process, and a model that adds them up."""
