"""What the commands of curlingctl do, a file for each group of them."""
