"""The formats in which a matrix is stored, and the plan that says which matrix has which."""
