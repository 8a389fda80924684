"""Gates: thresholds that a report must keep, judged on confidence bounds."""
