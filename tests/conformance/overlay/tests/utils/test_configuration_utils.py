"""Stands in for the module that the source distribution lacks; `ConfigTester` does not read it for nested configs."""

config_common_kwargs = {}
