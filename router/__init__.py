"""Pure decisions: gate, routing bias, expert map and epochs, replica choice, request placement."""
