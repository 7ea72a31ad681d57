"""Commands on finished runs; installed as ``skv_tools``, never imported by ``skv_dist``."""
