"""What a user writes: recipes, plans and policies, and the YAML files that hold them."""
