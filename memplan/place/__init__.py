"""CostTable + budgets -> Plan."""
