"""Training objectives: functions of a network and a batch."""
