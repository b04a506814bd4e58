-- Takes up to n tokens from all buckets at once, or as many as the scarcest has.
-- KEYS  1 account, 2 run (if ARGV 3 is '1'), then buckets, the run's own last (if ARGV 3 is '1').
-- ARGV  1 n, 2 lane, 3 whether there is a run; then for each bucket but the run's: refill a
--       microsecond, burst, floor, '1' if it yields with the account.
-- Answers granted, wait ms, status, circuit, open until ms, now us, then serials if granted.
redis.replicate_commands()
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local n, critical, has_run = tonumber(ARGV[1]), ARGV[2] == 'critical', ARGV[3] == '1'
local function ms(us) return math.max(0, math.ceil(us / 1000)) end

local status, refill, burst = '', false, false
if has_run then
  local run = redis.call('HMGET', KEYS[2], 'status', 'refill', 'burst')
  status, refill, burst = run[1] or '', run[2], run[3]
  if status ~= 'running' then return {0, 0, status, 'closed', 0, now} end
end

local account = redis.call('HMGET', KEYS[1], 'factor', 'blocked', 'until', 'half', 'probes', 'cool')
local factor = tonumber(account[1] or 1)
local until_us, half, probes = tonumber(account[3] or 0), account[4] == '1', tonumber(account[5] or 0)
local grant, circuit = n, 'closed'
if until_us ~= 0 then
  if now >= until_us then
    half, probes, until_us = true, PROBES, now + tonumber(account[6] or COOL_US)
  end
  grant, circuit = half and math.min(n, probes) or 0, half and 'half_open' or 'open'
  if grant == 0 then return {0, ms(until_us - now), status, circuit, ms(until_us), now} end
end
local blocked = tonumber(account[2] or 0)
if now < blocked then return {0, ms(blocked - now), status, circuit, 0, now} end

local keys, plans = {}, {}
for i = 4, #ARGV, 4 do
  local plan = {tonumber(ARGV[i]), tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])}
  if ARGV[i + 3] == '1' then
    plan[1], plan[2] = plan[1] * factor, math.max(1, plan[2] * factor)
    plan[3] = math.min(plan[3] * factor, plan[2] - 1)
  end
  if critical then plan[3] = 0 end
  plans[#plans + 1] = plan
  keys[#keys + 1] = KEYS[#plans + (has_run and 2 or 1)]
end
if refill and refill ~= '' then
  plans[#plans + 1] = {tonumber(refill), tonumber(burst), 0}
  keys[#keys + 1] = KEYS[#KEYS]
end
local found = #keys > 0 and redis.call('MGET', unpack(keys)) or {}

local tokens, serials = {}, {}
for i, plan in ipairs(plans) do
  if found[i] then
    local had, at, serial = struct.unpack('>ddd', found[i])
    tokens[i] = math.min(plan[2], had + math.max(0, now - at) * plan[1])
    serials[i] = serial
  else
    tokens[i], serials[i] = 0, 0
  end
  grant = math.min(grant, math.max(0, math.floor(tokens[i] - plan[3])))
end

local answer = {grant, 0, status, circuit, 0, now}
local wait, writes = 0, {}
for i, plan in ipairs(plans) do
  local left = tokens[i] - grant
  if grant > 0 then
    answer[6 + i] = serials[i] + 1
    writes[#writes + 1] = keys[i]
    writes[#writes + 1] = struct.pack('>ddd', left, now, serials[i] + 1)
  elseif not found[i] then
    writes[#writes + 1] = keys[i]
    writes[#writes + 1] = struct.pack('>ddd', 0, now, 0)
  end
  wait = math.max(wait, (1 + plan[3] - left) / plan[1])
end
if #writes > 0 then redis.call('MSET', unpack(writes)) end
if grant > 0 and circuit == 'half_open' then
  redis.call('HSET', KEYS[1], 'half', 1, 'probes', probes - grant, 'until', until_us)
  if account[4] ~= '1' or now >= tonumber(account[3]) then redis.call('HSET', KEYS[1], 'good', 0) end
end
if grant < n then answer[2] = ms(wait) end
return answer
