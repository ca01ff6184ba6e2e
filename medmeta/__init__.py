"""medmeta"""
