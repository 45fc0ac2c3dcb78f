"""The command `storagectl`: asks one guest's storaged, and shows what it says."""
