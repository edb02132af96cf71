"""What turns weights and results into folders others can load: converters, model cards, Hub folders."""
