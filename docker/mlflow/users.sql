-- MLflow's users live in a database of their own, beside the runs.
CREATE DATABASE mlflow_users;
