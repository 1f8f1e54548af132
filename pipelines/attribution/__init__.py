"""Attribution: which features caused a next token, and which features a feature feeds further on."""
