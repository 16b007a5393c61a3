"""Links between roles, and the dispatch of tokens to experts over them."""
