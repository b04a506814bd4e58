-- Puts unused tokens back, where nobody took from the bucket since: as if never taken.
-- KEYS  buckets.  ARGV  1 how many, then the serial of the take for each bucket.
-- Answers into how many buckets.
local n, done = tonumber(ARGV[1]), 0
for i, key in ipairs(KEYS) do
  local found = redis.call('GET', key)
  local serial = tonumber(ARGV[i + 1])
  if found then
    local tokens, at, last = struct.unpack('>ddd', found)
    if last == serial then
      redis.call('SET', key, struct.pack('>ddd', tokens + n, at, last + 1))
      done = done + 1
    end
  end
end
return done
