"""The page of an evaluation: charts, galleries, and the HTML around them."""
