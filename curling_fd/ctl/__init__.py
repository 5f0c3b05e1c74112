"""curlingctl, the tool of the administrator."""
