"""The two models: configurations, networks and losses."""
