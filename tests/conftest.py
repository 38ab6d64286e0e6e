"""Fixtures shared by areas: tests.support.lab_fixtures (namespaces with the programs loaded, once a session)."""

pytest_plugins = ["tests.support.lab_fixtures"]
