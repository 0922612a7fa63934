"""What tests of more than one room use."""

pytest_plugins = ["mlflow_servers"]
